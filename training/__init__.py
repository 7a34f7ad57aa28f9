"""Training of draft heads, and of the target model together with them."""

if not __name__.startswith("specdec."):
    raise ImportError("import it as specdec.training: 'training' alone is not a package of this project")
