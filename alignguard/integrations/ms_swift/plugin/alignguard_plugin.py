"""The file that ``--external_plugins`` names; it stands alone, since ms-swift puts its folder on the path."""

from alignguard.integrations.ms_swift import register

register()
