"""What single neurons say: their weights through the unembedding, labels, clamping, the results."""
