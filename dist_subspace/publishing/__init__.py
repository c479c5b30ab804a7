"""What others get: an adapter or a merged model on the Hub, with its card."""
