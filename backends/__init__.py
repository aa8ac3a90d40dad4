"""One folder for each engine; they do not know one another. See flexref.backend for the contract."""
