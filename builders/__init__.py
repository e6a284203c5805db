"""Builders of the files in assets/: python -m builders.NAME, from a checkout.

    build       people, labels, rewards, control: parts that other jobs of the project produce
    shapes      features of the shape Fréchet distance
    features    features of the Fréchet distance
    toy_flow    networks of the toy flow generator
    view_prior  prior of score distillation

They are in no wheel. `make assets` runs all of them in order. Nothing imports this package.
"""
