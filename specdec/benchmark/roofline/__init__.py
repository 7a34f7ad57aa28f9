"""How near a model's steps come to what its device can do, and where the rest of the time goes."""
