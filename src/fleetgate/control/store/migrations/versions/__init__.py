"""The steps of the schema in order, one file each."""
