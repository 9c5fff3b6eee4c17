"""Who calls the functions of a compiled circuit."""
