"""The text that corpora are made of: sources of installed Python packages, and documentation in Debian's packages."""
