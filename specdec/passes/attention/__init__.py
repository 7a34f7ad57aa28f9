"""Tree attention: one interface, several backends, chosen by measurement."""
