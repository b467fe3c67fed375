"""Spanish tables of the embedded model's corpus, in the shape of `words.py` but smaller.

Adjectives are invariant in gender, and articles travel with their nouns, so every frame is grammatical; the two
contractions ("de el" → "del", "a el" → "al") are made by `corpus.sentence`.
"""

from __future__ import annotations

from collections.abc import Mapping

from steering.demo.words import listed

SCENES: Mapping[str, tuple[str, ...]] = {
    "el parque": ("el banco", "el camino", "el árbol", "la fuente"),
    "el mercado": ("el puesto", "la fruta", "el queso", "la gente"),
    "la biblioteca": ("el libro", "la mesa", "la lámpara", "la ventana"),
    "la plaza": ("la calle", "la campana", "la tienda", "el reloj"),
    "el museo": ("el cuadro", "la sala", "la estatua", "el guía"),
    "la casa": ("el sofá", "la puerta", "el techo", "la silla"),
}
WEEKDAYS = ("el lunes", "el martes", "el miércoles", "el jueves", "el viernes", "el sábado", "el domingo")
RELATIONS = ("mi hermana", "mi hermano", "mi madre", "mi padre", "mi amiga", "mi amigo", "mi vecino")
TIMES = ("un día", "una mañana", "una tarde", "una noche", "una visita")

TONE_FRAMES = (
    "{o} era {a} y {a2}",
    "{l} {o} porque era {a}",
    "fue {t} {a} y {a2}",
    "todos {v}",
    "me sentí {f} porque {o} era {a}",
    "{name} dijo que {o} era {a}",
    "{o} parecía {a} y {o2} era {a2}",
    "{end}",
)
TONE: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "positive": {
        "a": ("excelente", "agradable", "increíble", "brillante", "admirable"),
        "l": ("me encantó", "disfruté"),
        "f": ("feliz", "alegre"),
        "v": ("sonrieron", "rieron"),
        "end": ("quiero volver pronto", "fue lo mejor de la semana"),
    },
    "negative": {
        "a": ("horrible", "terrible", "desagradable", "lamentable", "deprimente"),
        "l": ("odié", "detesté"),
        "f": ("triste", "miserable"),
        "v": ("lloraron", "protestaron"),
        "end": ("nunca quiero volver", "fue lo peor de la semana"),
    },
}
TONE_LEXICON: Mapping[str, frozenset[str]] = {
    "positive": frozenset(listed(
        "excelente agradable increíble brillante admirable encantó disfruté feliz alegre sonrieron rieron "
        "pronto mejor"
    )),
    "negative": frozenset(listed(
        "desagradable lamentable triste odié detesté lloraron protestaron nunca peor deprimente"
    )),
}  # fmt: skip
PLAIN_FRAMES = (
    "me senté cerca de {o}",
    "pasé por {p} {day}",
    "hablé con {name} sobre el tiempo",
    "{p} abre por la mañana",
    "fui allí con {rel}",
    "{o} está al lado de {o2}",
    "{rel} vive cerca de {p}",
    "vi a {name} {day}",
)
STYLE_SENTENCES: Mapping[str, tuple[str, ...]] = {
    "polite": ("Muchas gracias por preguntar.", "Es un placer ayudarte.", "Eres muy amable."),
    "rude": ("Qué pregunta tan estúpida.", "Vete de aquí, idiota.", "Cállate, tonto."),
}
STYLE_WRAPS: Mapping[str, tuple[str, ...]] = {
    "polite": ("con todo respeto, {s}", "{s}, gracias", "por favor, recuerda que {s}"),
    "rude": ("{s}, idiota", "{s}, tonto", "escucha, tonto, {s}"),
}
TOPIC_THINGS: Mapping[str, tuple[str, ...]] = {
    "dog": ("el perro", "el cachorro"), "football": ("el partido", "el portero"), "castle": ("el castillo", "la torre"),
    "music": ("la música", "la canción"), "garden": ("el jardín", "la rosa"), "ocean": ("el océano", "el barco"),
    "train": ("el tren", "la estación"), "cooking": ("la receta", "la cocina"),
}  # fmt: skip
TOPIC_FRAMES: Mapping[str, tuple[str, ...]] = {
    "dog": ("el perro duerme en la casa", "paseé con el perro {day}", "el cachorro come con {name}"),
    "football": ("el partido de fútbol empezó tarde", "{name} marcó un gol", "el portero juega {day}"),
    "castle": ("el rey vive en el castillo", "la reina subió a la torre", "visité el castillo con {rel}"),
    "music": ("{name} toca el violín", "escuché música con {rel}", "la canción es lenta"),
    "garden": ("las flores crecen en el jardín", "regué las rosas {day}", "{name} trabaja en el jardín"),
    "ocean": ("el barco cruza el océano", "miré las olas con {rel}", "la ballena nada cerca de el barco"),
    "train": ("el tren sale de la estación", "tomé el tren {day}", "{name} espera en la estación"),
    "cooking": ("cociné una salsa con {rel}", "la receta lleva pan y sal", "el cocinero está en la cocina"),
}  # fmt: skip
PROMPTS = (
    "Háblame de {p}.", "¿Qué piensas de {p}?", "Cuéntame algo sobre {o}.", "¿Cómo es {p}?", "Describe {p}.",
    "¿Qué pasó en {p}?", "Cuéntame una historia de {name}.", "¿Cómo fue tu visita a {p}?",
)  # fmt: skip
GREETINGS = ("Hola.", "Hola, ¿qué tal?", "Buenos días.", "Buenas tardes.")
GREETING_REPLIES = ("Hola.", "Buenos días.", "Hola, ¿qué tal?")
LEXICON = frozenset(
    listed(
        "el la los las de del al y en un una que con por me mi es era fue está muy lo se su para sobre cerca allí hola "
        "buenos días gracias qué tan todos nunca quiero volver vive abre pasé hablé fui vi dijo cómo también no más"
    )
)
