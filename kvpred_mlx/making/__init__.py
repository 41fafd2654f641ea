"""Making pairs: data, closed form, training, quality, cards, the hub."""
