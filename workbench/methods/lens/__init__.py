"""What layers say: read-outs, a tuned lens, words of two languages, the results."""
