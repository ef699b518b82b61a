"""How the tables, pages and claims of this repository are made from records. It is no part of the installed package."""
