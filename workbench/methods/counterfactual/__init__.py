"""The same dice after an edit: edits, agreement, the result."""
