"""Train one stage of a flow generator: the trainer, its objectives, and the runs that compare them."""
