"""The proof: campaigns that inject every fault we can, and look whether a promise breaks."""
