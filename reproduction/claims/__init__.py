"""The paper's claims beside what our records say of them."""
