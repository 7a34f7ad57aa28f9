"""Trees grown from ranked lists."""
