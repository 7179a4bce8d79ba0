"""Relation neurons: facts as prompts, average precision and its null, lesions, the results."""
