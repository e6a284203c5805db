"""The web server of the labelling application: who may ask what, and the answers."""
