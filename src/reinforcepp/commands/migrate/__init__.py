"""The command `migrate`: translate a training of TRL, OpenRLHF or verl to the settings of `reinforcepp train`."""
