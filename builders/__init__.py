"""Programs that make the files in assets/. From a checkout, run: python -m builders.NAME

    build       the generator of heads, labels, rewards, and the summary of the control run
    shapes      features of the shape Fréchet distance
    features    features of the image Fréchet distance
    toy_flow    networks of the toy flow generator
    view_prior  prior of score distillation

`make assets` runs all of them in order. They are not part of the installed package, and no other package
imports them.
"""
