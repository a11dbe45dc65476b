"""Random Spanish sentences with their English translation, of a vocabulary that is large enough for one sentence to be
said only once: adjectives come after their noun and agree with it, and verbs agree with their subject.

    el perro viejo abre dos puertas rojas detrás de la casa
    the old dog opens two red doors behind the house
"""

from __future__ import annotations

import zlib

import numpy as np

# Singular, plural, whether feminine, and both in English.
NOUNS = tuple(
    (singular, plural, gender == "f", english, many)
    for singular, plural, gender, english, many in (
        line.split()
        for line in """
        libro libros m book books
        perro perros m dog dogs
        gato gatos m cat cats
        coche coches m car cars
        barco barcos m ship ships
        hombre hombres m man men
        niño niños m boy boys
        médico médicos m doctor doctors
        árbol árboles m tree trees
        puente puentes m bridge bridges
        reloj relojes m clock clocks
        vaso vasos m glass glasses
        pan panes m loaf loaves
        huevo huevos m egg eggs
        pájaro pájaros m bird birds
        caballo caballos m horse horses
        zapato zapatos m shoe shoes
        sombrero sombreros m hat hats
        camino caminos m road roads
        jardín jardines m garden gardens
        espejo espejos m mirror mirrors
        cuchillo cuchillos m knife knives
        rey reyes m king kings
        pueblo pueblos m village villages
        mujer mujeres f woman women
        niña niñas f girl girls
        reina reinas f queen queens
        puerta puertas f door doors
        casa casas f house houses
        caja cajas f box boxes
        mesa mesas f table tables
        silla sillas f chair chairs
        ventana ventanas f window windows
        llave llaves f key keys
        carta cartas f letter letters
        flor flores f flower flowers
        iglesia iglesias f church churches
        escuela escuelas f school schools
        tienda tiendas f shop shops
        torre torres f tower towers
        vaca vacas f cow cows
        botella botellas f bottle bottles
        cama camas f bed beds
        manzana manzanas f apple apples
        piedra piedras f stone stones
        hoja hojas f leaf leaves
        isla islas f island islands
        lámpara lámparas f lamp lamps
        """.strip().splitlines()
    )
)
# Masculine and feminine singular, and English; a plural has one more `s`, or `es` after a consonant.
ADJECTIVES = tuple(
    tuple(line.split())
    for line in """
    rojo roja red
    blanco blanca white
    negro negra black
    amarillo amarilla yellow
    verde verde green
    azul azul blue
    nuevo nueva new
    viejo vieja old
    pequeño pequeña small
    grande grande big
    largo larga long
    corto corta short
    limpio limpia clean
    sucio sucia dirty
    caro cara expensive
    barato barata cheap
    pesado pesada heavy
    fuerte fuerte strong
    triste triste sad
    rico rica rich
    frío fría cold
    hermoso hermosa beautiful
    """.strip().splitlines()
)
# Third person in singular and plural, and both in English.
VERBS = tuple(
    tuple(line.split())
    for line in """
    abre abren opens open
    cierra cierran closes close
    busca buscan seeks seek
    mira miran watches watch
    compra compran buys buy
    vende venden sells sell
    lleva llevan carries carry
    encuentra encuentran finds find
    pierde pierden loses lose
    rompe rompen breaks break
    lava lavan washes wash
    pinta pintan paints paint
    quiere quieren wants want
    tiene tienen has have
    conoce conocen knows know
    olvida olvidan forgets forget
    """.strip().splitlines()
)
PLACES = {
    "en": "in", "cerca de": "near", "detrás de": "behind", "sobre": "on", "bajo": "under", "delante de": "before",
}  # fmt: skip
NUMBERS = {
    "dos": "two", "tres": "three", "cuatro": "four", "cinco": "five", "seis": "six", "siete": "seven", "ocho": "eight",
    "nueve": "nine", "diez": "ten",
}  # fmt: skip


def spanish_phrase(rng: np.random.Generator) -> tuple[str, str, bool]:
    """As `spanish_sentence`, of a noun with its article, and mostly with an adjective."""
    phrase, english, _, is_new = _noun_phrase(rng)
    return phrase, english, is_new


def spanish_sentence(rng: np.random.Generator) -> tuple[str, str, bool]:
    """A sentence, its translation, and whether it has a pair of noun and adjective that is in no training sentence. A
    fifth of the pairs are such pairs.
    """
    subject, english, is_plural, is_new = _noun_phrase(rng)
    singular, plural, one, many = VERBS[rng.integers(len(VERBS))]
    whom, english_whom, _, is_new_too = _noun_phrase(rng)
    words = [subject, plural if is_plural else singular, whom]
    translated = [english, many if is_plural else one, english_whom]
    if rng.random() < 0.3:
        place = list(PLACES)[rng.integers(len(PLACES))]
        noun, _, is_feminine, one, _ = NOUNS[rng.integers(len(NOUNS))]
        words += [place, "la" if is_feminine else "el", noun]
        translated += [PLACES[place], "the", one]
    spanish = " ".join(words).replace(" de el ", " del ")
    return spanish, " ".join(translated), is_new or is_new_too


def _noun_phrase(rng: np.random.Generator) -> tuple[str, str, bool, bool]:
    """Both languages, whether it is a plural, and whether its pair of noun and adjective is new."""
    noun, nouns, is_feminine, one, many = NOUNS[rng.integers(len(NOUNS))]
    kind = rng.integers(4)
    is_plural = kind >= 2
    words, translated = [nouns if is_plural else noun], [many if is_plural else one]
    is_new = False
    if rng.random() < 0.6:
        adjective = ADJECTIVES[rng.integers(len(ADJECTIVES))]
        form = adjective[is_feminine]
        words += [form + ("s" if form[-1] in "aeo" else "es") if is_plural else form]
        translated = [adjective[2], *translated]
        is_new = zlib.crc32(f"{noun} {adjective[0]}".encode()) % 5 == 0
    if kind == 0:
        article, english = ("la" if is_feminine else "el"), "the"
    elif kind == 1:
        article = "una" if is_feminine else "un"
        english = "an" if translated[0][0] in "aeiou" else "a"
    elif kind == 2:
        article, english = ("las" if is_feminine else "los"), "the"
    else:
        article = list(NUMBERS)[rng.integers(len(NUMBERS))]
        english = NUMBERS[article]
    return " ".join([article, *words]), " ".join([english, *translated]), bool(is_plural), is_new
