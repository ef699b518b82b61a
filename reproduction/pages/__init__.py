"""One module a page of `docs/`: it replaces the tables between marks by those of the records."""
