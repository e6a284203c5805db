"""RewardCS, the mesh reward of DreamCS (reconstructed): mesh encoder, data, and training with the
Cauchy-Schwarz term.
"""
