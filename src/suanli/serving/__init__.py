"""Answering requests with a trained model: protocol, engines in processes of their own, batches, HTTP and gRPC."""
