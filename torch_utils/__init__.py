"""Operations and statistics on tensors that are not specific to this project."""
