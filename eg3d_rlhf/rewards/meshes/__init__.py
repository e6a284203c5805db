"""RewardCS (reconstructed): a mesh encoder, its data and its training with the Cauchy-Schwarz term."""
