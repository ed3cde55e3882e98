"""Networks as Linen modules: arrays in, arrays out."""
