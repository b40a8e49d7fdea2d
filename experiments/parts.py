"""The parts of network and loss that an ablation can leave out."""

# Name of what can be left out -> what that is.
CHOICES = {
    "fusion": "the adapters in every block of SAM 2's image encoder",
    "rewriting": "their direction from vision to text",
    "decoder-fusion": "the product with the text before the mask decoder",
    "mask-prompt": "the mask prompt generator; SAM 2's embedding for 'no mask' replaces it",
    "sparse-prompt": "the sparse tokens; the decoder runs on its own tokens alone",
    "cross-entropy": "this term of the loss",
    "dice": "this term of the loss",
    "boundary": "this term of the loss, and its weight from the text",
    "soft-edges": "the boundary loss of the probability map; the published one, of the thresholded mask, replaces it",
    "pseudo": "the pseudo-mask's own loss, where the recipe has one",
}
