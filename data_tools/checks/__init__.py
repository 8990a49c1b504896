"""What is right and wrong with samples and with damaged tars."""
