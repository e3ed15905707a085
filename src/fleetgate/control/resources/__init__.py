"""The resources: their fields, their validation, the references between them, and changes to them."""
