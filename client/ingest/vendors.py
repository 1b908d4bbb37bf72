"""Who made a device: one of a closed list, so that no text of a header reaches a report."""

from typing import Final

from client.ingest import words

VENDORS: Final = {
    # the first that is found in a manufacturer's text names it
    name: words.vocabulary(entries)
    for name, entries in {
        "3DHISTECH": "dhistech",  # digits do not count
        "Agfa": "agfa*",
        "Alpinion": "alpinion",
        "BK Medical": "bk_medical bk_ultrasound",
        "Butterfly": "butterfly",
        "Canfield": "canfield",
        "Canon": "canon",
        "Carestream": "carestream kodak eastman",
        "CenterVue": "centervue icare",
        "Chison": "chison",
        "Clarius": "clarius",
        "DRTECH": "drtech",
        "Edan": "edan",
        "Esaote": "esaote biosound",
        "FotoFinder": "fotofinder teachscreen",
        "Sonosite": "sonosite",  # before Fujifilm, its owner
        "Fujifilm": "fuji fujifilm",
        "GE": "ge gehc gems g_e_medical* g_e_healthcare general_electric vingmed lunar",
        "Hamamatsu": "hamamatsu",
        "Heidelberg Engineering": "heidelberg_engineering",
        "Hitachi": "hitachi aloka",
        "Hologic": "hologic lorad supersonic",
        "Konica Minolta": "konica konicaminolta minolta",
        "Kowa": "kowa",
        "Leica": "leica aperio",
        "Mindray": "mindray zonare",
        "Motic": "motic",
        "Neusoft": "neusoft",
        "Nidek": "nidek",
        "Olympus": "olympus",
        "Optos": "optos",
        "Optovue": "optovue visionix",
        "Philips": "philips adac atl marconi picker elscint volcano",
        "Planmeca": "planmeca",
        "Roche": "roche ventana",
        "Samsung": "samsung medison neurologica",
        "Shimadzu": "shimadzu",
        "Siemens": "siemens acuson",
        "SonoScape": "sonoscape",
        "Visaris": "visaris",
        "Swissray": "swissray",
        "Terason": "terason teratech",
        "Tomey": "tomey",
        "Topcon": "topcon",
        "Toshiba": "toshiba",
        "United Imaging": "united_imaging uih",
        "Varian": "varian",
        "Zeiss": "zeiss",
    }.items()
}


def vendor_of(text: str) -> str:
    """The maker that a header's Manufacturer names.

    Args:
        text: as the header has it; spelling, case and legal form do not count.

    Returns:
        A name of the list; "other" for any other text; "not given" without any.
    """
    named = words.normalise([text])
    if not text.strip("\0 \t\r\n"):
        return "not given"
    return next((name for name, spelling in VENDORS.items() if spelling.search(named)), "other")
