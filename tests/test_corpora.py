"""The texts: same seed same text, nothing held out is ever shown, every word is known, streams repeat no word."""

from collections import Counter
from dataclasses import FrozenInstanceError
from itertools import islice
from random import Random

import pytest

from workbench import corpora
from workbench.corpora import code_styles, language, recall, relations, requests, stories, streams
from workbench.corpora.lexicon import OBJECT_CLASSES, SUBJECT_CLASSES, WORD_CLASSES

NAMES = tuple(corpora.PHENOMENA)
SPLITS = ("train", "held_out")
FRAMES = tuple(streams.SLOT_CLASSES)


def texts(name, split, seed, n):
    return [document.text for document in islice(corpora.PHENOMENA[name].documents(split, seed), n)]


@pytest.mark.parametrize("name", NAMES)
def test_same_seed_gives_the_same_text_and_another_seed_another(name):
    for split in SPLITS:
        assert texts(name, split, 3, 20) == texts(name, split, 3, 20)
        assert texts(name, split, 3, 20) != texts(name, split, 4, 20)
        assert corpora.PHENOMENA[name].items(split, 3) == corpora.PHENOMENA[name].items(split, 3)


@pytest.mark.parametrize("name", NAMES)
def test_every_word_is_in_the_vocabulary(name):
    known = set(corpora.vocabulary())
    for split in SPLITS:
        items = corpora.PHENOMENA[name].items(split, 0)
        assert items, f"{name} has no {split} items"
        said = " ".join(texts(name, split, 0, 300) + [f"{item.prompt} {item.answer}" for item in items])
        assert set(said.split()) <= known


def test_the_vocabulary_is_sorted_distinct_and_of_moderate_size():
    words = corpora.vocabulary()
    assert list(words) == sorted(set(words))
    assert 1000 <= len(words) + len(corpora.SPECIAL_TOKENS) <= 1500
    assert not any(word in words for word in corpora.SPECIAL_TOKENS)
    assert all(len(word.split()) == 1 for word in words)


@pytest.mark.parametrize("name", NAMES)
def test_answers_of_a_document_are_ranges_inside_it(name):
    for document in islice(corpora.PHENOMENA[name].documents("train", 0), 200):
        assert all(0 < start < stop <= len(document.words) for start, stop in document.answers)
        assert document.text.split() == list(document.words)


@pytest.mark.parametrize("name", [n for n in NAMES if n not in ("recall", "language")])
def test_no_held_out_item_is_in_a_training_text(name):
    # recall draws codes and fillers anew, language is checked by its combinations below
    shown = f" {' | '.join(texts(name, 'train', 0, 3000))} "
    items = corpora.PHENOMENA[name].items("held_out", 0)
    prompts = [item.prompt for item in items] if name == "requests" else [f"{i.prompt} {i.answer}" for i in items]
    if name == "code_styles":
        prompts = [item.prompt for item in items]
    assert not [prompt for prompt in prompts if f" {prompt} " in shown]


def test_request_and_program_combinations_are_split_without_overlap_or_loss():
    n_pairs = (len(requests.HARMLESS_VERBS) + len(requests.HARMFUL_VERBS)) * (
        len(requests.HARMLESS_NOUNS) + len(requests.DANGEROUS_NOUNS)
    )
    for split_of, total in (
        (requests.pairs, n_pairs),
        (code_styles.combinations, len(code_styles.TASKS) * len(code_styles.ARGUMENTS)),
    ):
        train, held_out = set(split_of("train")), set(split_of("held_out"))
        assert not train & held_out
        assert len(train) + len(held_out) == total
        assert 0.1 < len(held_out) / total < 0.3


def test_every_word_of_a_held_out_combination_is_seen_in_training():
    for column in (0, 1):
        assert {p[column] for p in requests.pairs("held_out")} <= {p[column] for p in requests.pairs("train")}


def test_language_holds_out_combinations_of_noun_and_verb():
    pairs = {}
    for split in SPLITS:
        rng = Random(0)
        pairs[split] = {language.sentence(rng, split)[1:3] for _ in range(3000)}
    assert not pairs["train"] & pairs["held_out"]
    assert {noun for noun, _ in pairs["held_out"]} <= {noun for noun, _ in pairs["train"]}


def test_translation_is_one_to_one_and_changes_the_order():
    values = list(language.DICTIONARY.values())
    assert len(set(values)) == len(values) == len(language.COMMON_WORDS)
    assert not set(values) & set(language.COMMON_WORDS)
    sentence = language.sentence(Random(1))
    back = {foreign: common for common, foreign in language.DICTIONARY.items()}
    adjective, noun, verb, thing = sentence
    assert tuple(back[word] for word in language.translate(sentence)) == (noun, adjective, thing, verb)


def test_there_are_twelve_relations_with_forty_subjects_or_more():
    assert len(relations.RELATIONS) == 12
    subjects = {name: {f.subject for f in relations.facts() if f.relation == name} for name in relations.RELATIONS}
    assert all(len(each) >= 40 for each in subjects.values())
    assert Counter(frozenset(each) for each in subjects.values()).most_common(1)[0][1] >= 4  # father, mother, ...
    objects = [frozenset(objects) for _, objects, _ in relations.RELATIONS.values()]
    assert Counter(objects).most_common(1)[0][1] >= 2  # birthplace, home and port are all towns


def test_a_fact_has_one_object_and_every_form_ends_right_before_it():
    rows = relations.facts()
    assert len({(f.relation, f.subject) for f in rows}) == len(rows)
    for fact in rows:
        for form in relations.FORMS:
            assert len(relations.answer(fact, form).split()) == 1
            assert fact.subject in relations.prompt(fact, form).split()


def test_a_held_out_fact_is_never_asked_in_training_but_is_stated():
    asked = next(f for f in relations.facts() if "question" in f.unseen)
    shown = f" {' | '.join(texts('relations', 'train', 0, 20_000))} "
    assert relations.prompt(asked, "question") not in shown
    assert f"{relations.prompt(asked, 'statement')} {asked.object} " in shown


def test_the_lre_form_fills_to_the_same_prompts():
    data = relations.lre("father", "question")
    sample = data["samples"][0]
    fact = next(f for f in relations.facts() if f.relation == "father" and f.subject == sample["subject"])
    assert data["prompt_templates"][0].format(sample["subject"]) == relations.prompt(fact, "question")
    assert sample["object"] == fact.object


def test_some_objects_have_a_word_in_both_languages():
    common = [f for f in relations.facts() if relations.answer(f, "foreign") != f.object]
    assert {f.relation for f in common} == {"craft", "pet", "food", "cargo"}


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("frame", FRAMES)
def test_a_stream_corpus_holds_every_word_once_and_sentences_of_one_length(frame, split):
    for seed in range(5):
        corpus = streams.corpus(frame, 50, seed, split)
        assert len(corpus.sentences) == 50
        assert {len(row) for row in corpus.sentences} == {len(corpus.slot_classes)}
        words = [word for row in corpus.sentences for word in row]
        assert len(set(words)) == len(words)
        for row in corpus.sentences:
            assert all(w in WORD_CLASSES[c] for w, c in zip(row, corpus.slot_classes, strict=True))


@pytest.mark.parametrize("frame", FRAMES)
def test_a_stream_corpus_is_a_function_of_its_seed(frame):
    assert streams.corpus(frame, 50, 1) == streams.corpus(frame, 50, 1)
    assert streams.corpus(frame, 50, 1).sentences != streams.corpus(frame, 50, 2).sentences


def test_in_streams_adjectives_agree_and_verbs_select():
    adjective_class = {a: k for k, (adjectives, _) in enumerate(SUBJECT_CLASSES) for a in adjectives}
    noun_class = {n: k for k, (_, nouns) in enumerate(SUBJECT_CLASSES) for n in nouns}
    verb_class = {v: k for k, (verbs, _) in enumerate(OBJECT_CLASSES) for v in verbs}
    thing_class = {n: k for k, (_, nouns) in enumerate(OBJECT_CLASSES) for n in nouns}
    for adjective, noun, verb, thing in streams.corpus("four", 60, 0).sentences:
        assert adjective_class[adjective] == noun_class[noun]
        assert verb_class[verb] == thing_class[thing]


def test_no_adjective_and_noun_of_a_held_out_stream_meet_in_a_training_stream():
    shown = " ".join(texts("streams", "train", 0, 500))
    for frame, at in (("four", 0), ("four_shifted", 2), ("eight", 0)):
        for row in streams.corpus(frame, 50, 0).sentences:
            assert f" {row[at]} {row[at + 1]} " not in f" {shown} "


def test_levels_name_harmonics_that_a_sentence_can_carry():
    for corpus in [*(streams.corpus(frame) for frame in FRAMES), streams.characters()]:
        assert all(1 <= harmonic <= len(corpus.slot_classes) // 2 for _, harmonic in corpus.levels)


def test_the_character_corpus_has_four_single_characters_a_sentence_and_repeats_none():
    corpus = streams.characters(50, seed=1)
    units = [unit for row in corpus.sentences for unit in row]
    assert corpus.joiner == "" and {len(row) for row in corpus.sentences} == {4}
    assert all(len(unit) == 1 for unit in units) and len(set(units)) == len(units) == 200


def test_topics_are_disjoint_and_share_words_between_them():
    own = [word for words in stories.TOPIC_WORDS.values() for word in words]
    assert len(stories.TOPICS) >= 8 and len(set(own)) == len(own)
    assert len(set(stories.vocabulary()) - set(own)) >= 30


@pytest.mark.parametrize("distance", [5, 64, 256, 480])
def test_recall_says_the_code_again_at_exactly_the_distance(distance):
    words = recall.document(Random(0), distance=distance).words
    code, again = words[3:7], words[-5:-1]
    assert code == again
    assert len(words) - 5 - 7 == distance  # words between the last symbol and the first one said again
    assert not set(words[7:-5]) & set(recall.SYMBOLS)  # the filler holds no symbol
    assert len(words) + 2 <= 512


def test_left_open_programs_are_written_with_braces_in_seven_of_ten_cases():
    documents = list(islice(code_styles.documents("train", 0), 8000))
    left_open = [d for d in documents if d.words[1] == "some"]
    share = sum("function" in d.words for d in left_open) / len(left_open)
    assert share == pytest.approx(0.7, abs=0.03)  # 4 standard errors at n = 4000


def test_programs_close_what_they_open():
    for task, arguments in code_styles.combinations("train"):
        brace = code_styles.program(task, arguments, "brace").split()
        layout = code_styles.program(task, arguments, "layout").split()
        assert brace.count("{") == brace.count("}") >= 1
        assert layout.count("indent") == layout.count("dedent") >= 1


@pytest.mark.parametrize("name", NAMES)
def test_a_split_that_there_is_none_of_is_refused(name):
    module = corpora.PHENOMENA[name]
    for ask in (lambda: module.document(Random(0), "test"), lambda: next(module.documents("test", 0))):
        with pytest.raises(ValueError, match="split: got 'test', expected 'train' or 'held_out'"):
            ask()


def test_wrong_arguments_are_told_what_was_expected():
    with pytest.raises(ValueError, match=r"got frame 'six', expected one of"):
        streams.corpus("six")
    with pytest.raises(ValueError, match=r"n_sentences=61.*1 to\s+60"):
        streams.corpus("four", 61)
    with pytest.raises(ValueError, match=r"expected 'train' or 'held_out'"):
        relations.items("test")
    with pytest.raises(ValueError, match=r"distance=500, expected 5 to 480"):
        recall.document(Random(0), distance=500)
    with pytest.raises(ValueError, match=r"expected adjective noun verb noun of the dictionary"):
        language.translate(("honest", "baker"))
    with pytest.raises(ValueError, match=r"this item has"):
        relations.items("train")[0].tag("distance")


def test_items_and_corpora_are_values():
    item = requests.items("train", 0)[0]
    assert hash(item) == hash(requests.items("train", 0)[0])
    with pytest.raises(FrozenInstanceError):
        item.prompt = ""
