"""Whether new maps are like those that the model was validated on."""
