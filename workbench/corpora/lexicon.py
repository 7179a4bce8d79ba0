"""The words of the main language by class: one list per word class and per semantic class inside it.

Law: within streams every word has one class and, where classes agree, one semantic class (agreement(a) = class(noun)).
Source: written for this project; streams.py says which lists agree with which.
"""

from .item import words

# --- nouns that do things; each semantic class has its own adjectives ---
PERSON_NOUNS = words(
    """
baker miller weaver hunter doctor tailor painter potter barber mason smith tanner cooper shepherd
butler lawyer juggler gardener porter dancer plumber jeweler scribe banker clerk tutor sculptor printer
"""
)
ANIMAL_NOUNS = words(
    """
fox badger otter rabbit falcon raven weasel hedgehog lizard tortoise squirrel heron beaver ferret
wolf bear lynx moose bison camel donkey zebra panda goat toad newt pigeon parrot
"""
)
PLANT_NOUNS = words(
    """
oak birch willow cedar maple poplar hazel ivy fern moss rose tulip lily daisy
orchid thistle clover nettle cactus bamboo holly lilac poppy violet sage reed elm ash
"""
)
MACHINE_NOUNS = words(
    """
tractor engine crane robot drill forklift pump turbine loom mill press bulldozer scooter truck
wagon bicycle blender mixer lathe boiler furnace radio piano organ clock compass scanner lantern
"""
)

# --- nouns that things are done to; each semantic class has its own verbs ---
FOOD_NOUNS = words(
    """
bread cheese honey soup rice pasta butter porridge pickles walnuts cherries cabbage turnips dumplings
pancakes noodles lentils olives
"""
)
TOOL_NOUNS = words(
    """
hammer saw chisel ladder rope shovel bucket anvil pliers wrench needle scissors broom rake
hatchet crowbar trowel tongs
"""
)
CLOTH_NOUNS = words(
    """
coat scarf mittens hat apron boots blanket curtain shirt gown belt stockings shawl cape
sandals waistcoat trousers ribbon
"""
)
PLACE_NOUNS = words(
    """
bridge tunnel meadow valley hill orchard canal harbor tower gate alley swamp desert ridge
courtyard pasture quarry island
"""
)

PERSON_ADJECTIVES = words(
    """
honest jealous polite grumpy clever lonely proud modest witty lazy patient stubborn generous shy brave gloomy
"""
)
ANIMAL_ADJECTIVES = words(
    """
furry feral tame hungry nimble spotted striped fierce sleepy playful wary venomous shaggy hoofed winged frisky
"""
)
PLANT_ADJECTIVES = words(
    """
leafy thorny blooming mossy rooted fragrant withered evergreen sprouting budding wilting climbing grafted pollinated
pruned hardy
"""
)
MACHINE_ADJECTIVES = words(
    """
rusty noisy electric broken greasy automatic portable mechanical squeaky rattling oiled wired motorized dented
calibrated steamy
"""
)

FOOD_VERBS = words(
    """
eats tastes cooks chews swallows bakes fries boils salts nibbles devours roasts seasons stirs digests grates
"""
)
TOOL_VERBS = words(
    """
grips wields sharpens borrows swings repairs lends handles drops hides stacks misplaces fastens wipes lifts stores
"""
)
CLOTH_VERBS = words(
    """
wears folds sews irons knits mends stitches washes buttons unfolds dyes tears hems drapes patches wrinkles
"""
)
PLACE_VERBS = words(
    """
crosses visits enters leaves explores guards surrounds approaches avoids occupies maps circles invades passes
abandons inhabits
"""
)

# --- words of the second clause of an eight-word sentence ---
PARTICIPLES = words(
    """
smiling weeping limping yawning shivering sneezing blinking trembling frowning panting blushing sweating coughing
giggling snoring grinning nodding pouting squinting sulking wincing gasping staring drooling hiccuping shrugging
slouching stumbling tiptoeing wheezing fidgeting groaning hovering idling jogging kneeling leaning lurking meditating
pacing resting sagging strolling swaying tapping twitching waiting wandering waving whispering wobbling wriggling
crouching dozing drifting floating
"""
)
INTRANSITIVES = words(
    """
sleeps sings falls laughs cries runs jumps swims waits dreams sneezes coughs arrives vanishes stumbles giggles yawns
shivers blinks trembles kneels wanders dances whistles hums roars barks grows glows shines melts bounces rolls spins
slips sinks drifts floats crawls gallops trots marches hesitates complains argues apologizes rests relaxes meditates
wobbles sways leans pauses sighs gasps groans
"""
)
ADVERBS = words(
    """
slowly quickly loudly quietly gently rudely happily sadly eagerly calmly boldly bravely briefly brightly carefully
cheerfully clumsily daily deeply early easily exactly fast fiercely firmly foolishly freely gladly gracefully greedily
harshly hastily hourly kindly late lazily lightly merrily nearly neatly nightly often patiently politely promptly
rapidly rarely reluctantly seldom silently smoothly softly solemnly suddenly tenderly twice warmly weekly
"""
)

SUBJECT_CLASSES = (
    (PERSON_ADJECTIVES, PERSON_NOUNS),
    (ANIMAL_ADJECTIVES, ANIMAL_NOUNS),
    (PLANT_ADJECTIVES, PLANT_NOUNS),
    (MACHINE_ADJECTIVES, MACHINE_NOUNS),
)
OBJECT_CLASSES = (
    (FOOD_VERBS, FOOD_NOUNS),
    (TOOL_VERBS, TOOL_NOUNS),
    (CLOTH_VERBS, CLOTH_NOUNS),
    (PLACE_VERBS, PLACE_NOUNS),
)


def _flat(classes, part: int) -> tuple[str, ...]:
    return tuple(word for lists in classes for word in lists[part])


# what a next-word distribution is summed over when the mass on a word class is asked for
WORD_CLASSES = {
    "adjective": _flat(SUBJECT_CLASSES, 0),
    "noun": _flat(SUBJECT_CLASSES, 1) + _flat(OBJECT_CLASSES, 1),
    "verb": _flat(OBJECT_CLASSES, 0),
    "participle": tuple(PARTICIPLES),
    "intransitive": tuple(INTRANSITIVES),
    "adverb": tuple(ADVERBS),
}
