"""How bundled pairs are made, from the corpus to the model card."""
