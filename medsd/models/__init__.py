"""What learns or encodes: codecs, UNets, text conditioning, adapters."""
