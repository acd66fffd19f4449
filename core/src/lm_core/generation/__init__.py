"""Generation of token sequences: sampling, greedy decoding, beam search."""
