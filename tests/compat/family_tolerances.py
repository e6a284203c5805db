"""How far values of families of flow generators may be from the original's: largest difference over largest
value, float32.
"""

VELOCITY = 1e-6  # also of losses, blocks, tokens of times
GRADIENT = 1e-5
TRAJECTORY = 2e-5
TOKENS = 1e-5  # of a given picture
ENCODER = 3e-5
DECODED = 1e-5  # numbers that a decoder gives; which voxels and faces there are is equal
ADAPTED = 1e-6  # of networks with adapters, beside the weights or merged
HALF = 4e-3  # of files in float16 or bfloat16
