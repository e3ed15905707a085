"""Resources as users write them: fields, validation, references, apply."""
