"""Translation with encoder–decoders: text, batches by tokens, networks, evaluation, beam search."""
