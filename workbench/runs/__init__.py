"""What many runs say together: records, SQL, tables over seeds, comparison, making one again, removal."""
