"""Commands of the command line beside those of training, a file each; ``cli`` names them."""
