"""One-off studies behind sentences in the documentation; each is a command of its own."""
