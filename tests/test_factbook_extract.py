"""The readers of single facts, on texts as the Factbook has them."""

import pytest

from mgrpo_jax.tasks.factbook import extract, text

CASES = [
    (extract.capital, "Lima\ngeographic coordinates: 12 03 S", "Lima"),
    (extract.capital, "Suva (on Viti Levu)", "Suva"),
    (extract.capital, "Washington, D.C.", "Washington, D.C."),
    (extract.capital, "Chisinau in Romanian (Kishinev in Russian)", "Chisinau"),
    (extract.capital, "Santiago; note - Valparaiso is the seat", "Santiago"),
    (
        extract.capital,
        "La Paz (administrative capital); Sucre (constitutional capital)",
        None,
    ),
    (extract.capital, "Gitega (political capital), Bujumbura (other)", None),
    (extract.capital, "no official capital; offices in Yaren", None),
    (extract.capital, "administered from London; often", None),
    (extract.internet_code, ".pe", ".pe"),
    (extract.internet_code, "metropolitan France - .fr; Guiana - .gf", None),
    (extract.currency, "nuevo sol (PEN) per US dollar -", "nuevo sol"),
    (extract.currency, "baht per US dollar -", "baht"),
    (
        extract.currency,
        "Tuvaluan dollars or Australian dollars (AUD) per US " "dollar -",
        None,
    ),
    (extract.currency_code, "nuevo sol (PEN) per US dollar -", "PEN"),
    (extract.currency_code, "baht per US dollar -", None),
    (extract.currency_code, "rubles (BYB/BYR) per US dollar -", None),
    (extract.official_language, "Spanish (official), English", "Spanish"),
    (
        extract.official_language,
        "Haitian Creole 90%, French 4.5% (official, see note)",
        "French",
    ),
    (extract.official_language, "Spanish (official), Quechua (official)", None),
    (extract.official_language, "English, Greek", None),
    (extract.point_name, "Nevado Huascaran 6,746 m", "Nevado Huascaran"),
    (
        extract.point_name,
        "Kilimanjaro (highest point in Africa) 5,895 m",
        "Kilimanjaro",
    ),
    (extract.point_name, "unnamed elevation 805 m", None),
    (extract.point_name, "3.6 km W. of Al-Salmi Border Post 300 m", None),
    (extract.point_elevation, "Nevado Huascaran 6,746 m", "6,746 m"),
    (extract.point_elevation, "Chott Melrhir -40 m", "-40 m"),
    (extract.point_elevation, "Mont Blanc 4,810", None),
    (extract.metres, "1,555 m", "1,555 m"),
    (
        extract.square_kilometres,
        "1,285,216 sq km\nland: 9 sq km",
        "1,285,216 sq km",
    ),
    (extract.square_kilometres, "1.267 million sq km", None),
    (extract.square_kilometres, "land: 5 sq km", None),
    (extract.kilometres, "0 km (landlocked)", "0 km"),
    (extract.kilometres, "11.1 km", "11.1 km"),
    (extract.count, "32,768,614 (2025 est.)\nmale: 16", "32,768,614"),
    (extract.count, "uninhabited", None),
    (extract.count, "male: 16", None),
    (extract.years, "68.9 years (2024 est.)", "68.9 years"),
    (extract.percentage, "93.7% (2024 est.)", "93.7%"),
    (extract.percentage, "female: 74.2%", None),
    (extract.independence_year, "5 July 1962 (from France)", "1962"),
    (
        extract.independence_year,
        "24 September 1973 (declared); 10 September 1974 (from Portugal)",
        None,
    ),
    (extract.independence_year, "none (territory of the US)", None),
    (extract.nationality, "Peruvian\nnoun: Peruvian(s)", "Peruvian"),
    (extract.nationality, "Congolese or Congo\nnoun: Congolese", None),
    (extract.nationality, "Antiguan, Barbudan", None),
    (extract.nationality, "none", None),
    (extract.anthem, '"Kassaman" (We Pledge)\nhistory: "x"', "Kassaman"),
    (extract.anthem, '"A" [Ndebele] "B" [English]', None),
    (extract.aircraft_prefix, "OB", "OB"),
    (extract.aircraft_prefix, "TZ, TT", None),
    (extract.single_name, "Bechuanaland", "Bechuanaland"),
    (extract.single_name, "Serendib, Ceylon", None),
    (extract.national_day, "Independence Day, 28 July (1821)", "28 July"),
    (extract.national_day, "A Day, 5 July (1962); B Day, 1 November", None),
    (
        extract.largest_city,
        "1.852 million Matola, 1.163 million Maputo (capital), 969,000 "
        "Nampula (2023)",
        "Matola",
    ),
    (extract.largest_city, "600,000 Djibouti (capital) (2023)", "Djibouti"),
    (extract.first_item, "gold, crude petroleum (2023)", "gold"),
    (extract.only_item, "mokorotio (Basotho hat)", "mokorotio"),
    (extract.only_item, "red star, chollima (winged horse)", None),
    (extract.first_partner, "Brazil 30%, USA 9% (2023)", "Brazil"),
    (extract.first_partner, "USA 11%, France 11% (2023)", None),
    (extract.colors, "red, white", "red, white"),
    (extract.colors, "blue, white, green, black", None),
    (extract.time_zone, "UTC-5 (same time as Washington, DC)", "UTC-5"),
    (extract.time_zone, "UTC 0 (5 hours ahead of Washington)", "UTC 0"),
]


@pytest.mark.parametrize("reader, passage, expected", CASES)
def test_reads_what_is_clear_and_nothing_else(reader, passage, expected):
  value = reader(passage)
  assert (value and value.text) == expected
  if value:
    assert value.text in passage
    assert value.text not in value.aliases


def test_aliases_and_numbers():
  area = extract.square_kilometres("1,285,216 sq km")
  assert area.number == 1285216.0
  assert set(area.aliases) == {"1285216 sq km", "1,285,216", "1285216"}
  assert extract.capital("Brasília").aliases == ("Brasilia",)
  assert extract.capital("Belgrade (Beograd)").aliases == ("Beograd",)
  assert extract.capital("Kyiv (Kiev is the transliteration)").aliases == ()
  assert extract.internet_code(".pe").aliases == ("pe",)
  assert extract.national_day("X, 28 July (1821)").aliases == ("July 28",)
  assert extract.anthem('"Hino" (Anthem)').aliases == ("Anthem",)


def test_borders_with_remarks_and_split_stretches():
  found = extract.borders(
      "Azerbaijan 338 km; China (southeast) 4,133 km and China (south) 46 km;"
      " Jordan 327 km (20 km are within the Dead Sea); Zambia 0.15 km"
      "\nnote: Mars 12 km"
  )
  assert found == (
      ("Azerbaijan", 338.0),
      ("China", 4179.0),
      ("Jordan", 327.0),
      ("Zambia", 0.15),
  )


@pytest.mark.parametrize(
    "passage, number",
    [
        ("France 6 km", 1.0),
        ("Niger 838 km, Senegal 489 km", 2.0),
        ("Norway 191 km; Russia (northeast) 5 km and Russia (west) 1 km", 2.0),
        ("Bolivia; Brazil 5 km", None),  # one of two without a length
        ("none", None),
    ],
)
def test_border_count(passage, number):
  value = extract.border_count(passage)
  assert (value and value.number) == number


def test_clean_keeps_words_and_drops_markup():
  raw = (
      "<p>in the&nbsp; west&mdash;\u201csierra\u201d</p><br><br><strong>note:"
      "</strong> &lt;1% <em>S&atilde;o</em> &amp;amp; "
  )
  assert text.clean(raw) == 'in the west-"sierra"\nnote: <1% São &'
  assert text.slug("Côte d'Ivoire") == "cote-divoire"
  assert text.fold("Brasília") == "Brasilia"


@pytest.mark.parametrize(
    "raw, quiet",
    [
        ("11.2 million LIMA (capital), Trujillo", "Lima (capital)"),
        ("PORT-AU-PRINCE (capital)", "Port-au-Prince"),
        ("ANDORRA LA VELLA (capital)", "Andorra la Vella"),
        ("NUKU'ALOFA", "Nuku'alofa"),
        ("LA PAZ", "La Paz"),
    ],
)
def test_quiet(raw, quiet):
  assert quiet in text.quiet(raw)
