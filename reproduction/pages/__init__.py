"""One module for each page of `docs/`: it replaces the tables between marks by those of the records."""
