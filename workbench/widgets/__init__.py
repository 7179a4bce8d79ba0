"""Interactive desks: a view-model without widgets, and a thin face. No maths here."""
