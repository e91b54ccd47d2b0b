"""What the page takes for granted: packages that jaxnorm does not depend on."""

NEEDS = {"keras": "keras", "haiku": "haiku", "equinox": "equinox"}
