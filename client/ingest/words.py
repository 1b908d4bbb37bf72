"""Words of header text that tell what an image shows, in the languages hospitals write.

Text of a file is only compared with these lists; it is never returned, stored or logged. Case,
accents, digits and punctuation do not count: `TÓRAX_2` is the word torax. In a list, `*` stands
for any letters and `_` for the space inside a phrase.
"""

import re
import unicodedata
from collections.abc import Iterable
from typing import Final

MAX_CHARACTERS: Final = 256
"""Looked at of one value; DICOM allows its short texts 64."""


def normalise(texts: Iterable[str]) -> str:
    """Lower-case words without accents, one space apart; `|` keeps texts from forming phrases."""
    folded = unicodedata.normalize("NFKD", "|".join(t[:MAX_CHARACTERS] for t in texts).casefold())
    letters = "".join(c for c in folded if not unicodedata.combining(c))
    return re.sub(r"[^\w|]+", " ", re.sub(r"[\d_]", " ", letters)).strip()


def vocabulary(entries: str) -> re.Pattern[str]:
    """A pattern that finds the entries of a list as whole words of normalised text."""
    spelled = (
        r"\w*".join(re.escape(normalise([part])) for part in entry.split("*"))
        for entry in entries.split()
    )
    return re.compile(rf"\b(?:{'|'.join(spelled)})\b")


# A radiograph's body part. Words left out on purpose: brust and borst (also breast), face (French
# for frontal), main (French hand), haut (French upper), and lung inside a word (German -lung);
# chest only whole, for Manchester's sake.

CHEST: Final = vocabulary("""
    chest chests chestpa chestap chestlat* chestxray cxr pcxr xrchest chestabd* thx thorax*
    rxthorax torax* rxtorax toraks* torace lung lungs lungfield* pulmo pulmones lunge lungen
    lungenauf* lungenubersicht lungor lunger lungront* brustkorb* longfoto* longen poumon*
    pulmonaire* pulmon pulmonar* pecho petto polmon* pulmao pulmoes peito plaman* borstkas
    brostkorg brystkasse rintakeha keuhko* mellkas* tudofelvetel klatk* klp pluc* płuc* hrudnik*
    plice pluca* akciger* grudni_kos pljuc* легк* огк *флюорограф* θωρακ* πνευμον* الصدر חזה ngực
    phổi paru
""")

CHEST_ADJECTIVES: Final = vocabulary("""
    thorac* thorak* torac* torak* pulmonal* heart herz* coeur cuore corazon coracao mediastin*
    piersiow* грудн* *胸* *肺* *흉부*
""")
"""Speak of the chest only where no other part is named: thoracic spine, 胸椎."""

OTHER_PARTS: Final = vocabulary("""
    *abdom* abdo chestabd* kub asp bauch* buik* brzuch* pelvi* becken* bassin bacino bekken hip
    hips hanche* hufte* huefte* cadera* anca anche heup* quadril kidney* urogra* ivu cysto*
    stomach magen* oesoph* esoph* colon bowel barium spine* spinal* *spine rachis column columna
    colonna coluna *wirbel* *wervel* *vertebr* lws bws hws lumb* lomb* sacrum sacral* sacro*
    sakral* coccy* cervic* cervik* dorsolumb* dorsolomb* thoracolumb* thoracolomb* toracolumb*
    toracolomb* kregos* scolios* skolios* *позвон* *椎* *척추* rib ribs *rippe* cotes gril costal*
    costill* costel* coste ribben zebra рёбр* hemithora* bony osseous *knochern* *knoechern*
    sternum sternal* sternoclav* clavic* *selbein scapul* shoulder* schulter* epaule* hombro*
    spalla ombro* schouder* barki arm arms upper_limb lower_limb oberarm* unterarm* humer* umer*
    bras brazo braccio braco elbow* *ellbogen *ellenbogen coude* codo gomito cotovelo elleboog
    forearm* avant_bras antebra* avambraccio radius ulna wrist* poignet* muneca* polso punho pols
    *handgelenk* hand hands *handen mano mani mao finger* doigt* dedo* dito dita vinger* thumb*
    daumen pouce leg legs *bein *schenkel* jambe* pierna* gamba* perna femur* femor* thigh*
    cuisse muslo coxa knee* knie* genou* rodilla* ginocch* joelho* patell* tibia* fibul* ankle*
    *sprunggelenk* osg cheville* tobillo* cavigli* tornozelo* enkel* foot feet *fuss* pied* pie
    pies piede* voet* toe toes zeh* orteil* calcan* heel extremit* extremid* skull* schadel*
    schaedel* cran* schedel* czaszk* head kopf* cabeza cabeca testa hoofd facial orbit* sinus*
    nnh nasal nose jaw kiefer* mandib* maxill* dental* dent tooth teeth zahn* panoram* opg neck
    hals* cuello collo pescoco череп* таз колен* breast* mamm* mama mamas mlo skelet* whole_body
    wholebody bone_age *腹* *骨* *膝* *복부*
""")

SKIN: Final = vocabulary("""
    skin derm* melano* naevus naevi nevus nevi moles psoria* eczem* ekzem* acne akne rash
    hautarzt* hautklinik* hautkrebs hautbefund* hautlasion* hautlaesion* hautverand* peau piel
    pelle pele huid* hud hudlasion* iho skora kuze cilt кож* δερμ* 皮肤 皮膚 *皮膚* *皮肤* *피부*
""")

NOT_WHITE_LIGHT: Final = vocabulary("""
    fa ffa fag fla ica icg icga fluo* *angiogr* *angiofluo* autofluo* faf af baf gaf oct octa rf
    ir nir redfree red_free rotfrei* anerythr* anerit* aneritr* infrared infrarouge infrarot*
    infrarojo indocyan* indozyan* indocian* multicolor* topogr* pachy*
""")
"""Photographs of the fundus other than in natural colour."""

ANTERIOR_EYE: Final = vocabulary("""
    anterior_segment anterior_chamber segment_anterieur segmento_anterior* segmento_anteriore
    vorderabschnitt* vorderkammer* slit_lamp* slitlamp* spaltlampe* lampe_a_fente
    lampara_de_hendidura cornea* cornee* hornhaut* iris conjunctiv* konjunktiv* eyelid* oberlid*
    unterlid* external_eye gonio* sclera* sklera*
""")

PAGE: Final = vocabulary("""
    patient_protocol patientenprotokoll* dose_report* dose_info* dose_summary dosisprotokoll*
    dosisbericht* rapport_de_dose informe_de_dosis protocole_patient protocolo_paciente
    protocollo_paziente exam_summary screen_save* screen_shot* screenshot* som_prot
""")
"""Pages of text that a scanner stores beside its images."""
