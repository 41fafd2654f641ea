"""Which positions of a prompt are exact, and how rows in the middle of a cache are computed."""
