"""What a data manager can do about the files that gave no picture: a line for each reason."""

from typing import Final

from client.ingest.types import Reason

MEND: Final[dict[Reason, str]] = {
    Reason.EMPTY: "An interrupted copy leaves empty files: export them again.",
    Reason.UNREADABLE: "Give the account that runs prepare the right to read them, check the disk "
    "or share, and prepare again with --restart.",
    Reason.LINK: "If the directory it points to is not among the sources, name it as one.",
    Reason.DAMAGED_HEADER: "Export these files again.",
    Reason.TRUNCATED: "The transfer stopped early: copy or export these files again.",
    Reason.DAMAGED_PIXELS: "Open one in a viewer. If it fails there too, export it again.",
    Reason.NO_DECODER: "Export these files uncompressed (Explicit VR Little Endian) or as "
    "JPEG 2000.",
    Reason.SIZE_LIE: "Damaged, or made to do harm: find out where they come from, export again.",
    Reason.TOO_LARGE: "Export a smaller version; give whole slides in the scanner's own format.",
    Reason.NOT_FINITE: "Write the volume again without NaN and infinity.",
    Reason.UNDECIDED: "Put them into a folder named for their modality (ct, cxr, us, ...) and "
    "prepare again with --restart, or prepare them apart with --modality.",
    Reason.BURNED_IN: "Look at a few. If the text may be blanked, or names nobody, prepare again "
    "with --restart and --burned-in CLASS=mask, or CLASS=accept.",
    Reason.EXTRA_MISSING: "Install the extra (volumes for NIfTI, slides for whole slides) and "
    "prepare again with --restart.",
    Reason.TOO_MUCH_MEMORY: "Prepare again with --restart and more --memory; with fewer --jobs if "
    "that is too much for the machine.",
    Reason.TIMED_OUT: "Prepare again with --restart and a longer --timeout; what hangs again is "
    "damaged.",
    Reason.WORKER_DIED: "The run went on unharmed; export these files again.",
    Reason.READER_FAILED: "Our fault, or a kind of file we did not foresee: tell us the error "
    "named in rejected.csv, without the file.",
}
"""Images may be lost that the site can win back."""

LEAVE: Final[dict[Reason, str]] = {
    Reason.SPECIAL: "Nothing: pipes, sockets and devices hold no image.",
    Reason.NOT_AN_IMAGE: "Nothing, if these are texts and lists beside the images. Save images of "
    "a format we do not read as PNG.",
    Reason.DICOMDIR: "Nothing: the images it lists are read by themselves.",
    Reason.NO_PIXELS: "Nothing: reports, plans, waveforms and presentation states.",
    Reason.TOO_SMALL: "Nothing: below 16 pixels there is nothing to learn from.",
    Reason.CONSTANT: "Nothing: blank images. If one device makes many, check its export.",
    Reason.OTHER_MODALITY: "Nothing: MR, nuclear medicine, mammography, segmentations, doses.",
    Reason.LOCALIZER: "Nothing: scouts only show where the slices lie.",
    Reason.NO_TISSUE: "Nothing, if the slides are empty, or labels and overviews.",
    Reason.DUPLICATE: "Nothing: one copy is in the shard.",
    Reason.NEAR_DUPLICATE: "Nothing: one version is in the shard.",
}
"""As it should be; a look is worth it only where the number surprises."""

REMEDY: Final = MEND | LEAVE
