"""Programs that make the files in assets/. From a checkout, run: python -m builders.NAME

    build       the generator of heads, labels, rewards, and the summary of the control run
    people      a generator of heads of the third or the fourth edition, in a folder
    people_checks   whether the backs of its heads repeat their faces
    shapes      features of the shape Fréchet distance
    features    features of the image Fréchet distance
    toy_flow    networks of the toy flow generator
    view_prior  prior of score distillation

    flow_memory memory of the published flow generators, a file of the package and not of assets/

`make assets` runs all others in order. They are not part of the installed package, and no other package
imports them.
"""
