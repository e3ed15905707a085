"""Usage journals of the workers, folded into rows."""
